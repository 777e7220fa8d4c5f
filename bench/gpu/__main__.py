"""What only a GPU can tell: `python -m basinescape.bench.gpu --out FILE.json`. Tools run this file by its path, too."""

from basinescape.bench.gpu.trials import main

main()

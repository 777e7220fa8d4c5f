"""What only a GPU can tell: `python -m basinescape.bench.gpu --out FILE.json`."""

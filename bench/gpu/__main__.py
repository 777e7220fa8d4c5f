from .trials import main

main()

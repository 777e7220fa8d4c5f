"""What every long run needs: its folder, its journal, files written whole, progress, and what made it."""

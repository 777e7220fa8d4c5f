"""What every long run needs: its folder, a journal of what is done, atomic writes, progress, and a record of what made it."""

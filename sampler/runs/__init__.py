"""The parts of every long run: its folder, a journal of finished work, atomic writes, progress, and provenance."""

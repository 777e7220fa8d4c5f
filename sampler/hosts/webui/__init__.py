"""An extension of the webuis AUTOMATIC1111 and Forge: link this folder into `extensions`, and install basinescape beside them.

`scripts/basin_escape.py` is what they load: the sliders. `guided.py` is what the sliders do.
"""

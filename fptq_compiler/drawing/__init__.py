"""Draws a model: what its graph was found to be, as SVG or as one HTML page.

scene.py     what there is to draw: boxes, edges, blocks; names and numbers only
condense.py  a program's graph becomes boxes and edges
blocks.py    boxes are dealt out to blocks, and runs of equal blocks drawn together
layout.py    where each box of a block stands
svg.py       the text of the drawing
page.py      the HTML page around it, and the file
"""

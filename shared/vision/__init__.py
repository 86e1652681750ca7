"""Labelled images for all papers: read, drawn, projected, learnt from.

`images`: `LabelledImages`, `load` (sets of the catalogue), `folder` (the reader's own),
`synthetic`. `reading`: one image file of any mode. `projection`: principal components.
`backbones`: networks by name, with their spatial map. `training`: one seeded loop. `episodes`:
few-shot tasks. `classes`: names of classes, without torch, for tables and figures.
"""

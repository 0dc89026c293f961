"""Pages that are kept on disk, to be found when a text begins as one before.

keeper   keeps the pages of what is read, finds those of what was
store    the folder of files: a cap, and the oldest go first
texts    which texts are kept there: to be shown, and removed one by one
names    what files are called, which an end builds on
layout   what they hold of pages and raw cells
file     one file: head, bytes, checksums; `head`: its head alone
"""

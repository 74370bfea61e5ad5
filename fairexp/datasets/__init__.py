"""Data sets: map-style torch classes, found by the dotted name in `configs/dataset/`.

One that sits in memory also has `__getitems__(indices)`, which returns a whole collated batch in one gather. fairexp's
loader calls it; a plain `DataLoader` then needs `collate_fn=lambda batch: batch`.
"""

"""Feature caches: the outputs of frozen networks for a data set, computed once, stored in shards and read in training.

`extract` turns items into features and `released` imports published ones, `build` writes them (resumable), `store` and
`training` read them, `verify` checks them; `shards` is the file format, `keys` identifies the content of an entry.
"""

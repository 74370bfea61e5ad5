"""The models shelf: plain `nn.Module`s, one file each, chosen by a config's `model._target_`."""

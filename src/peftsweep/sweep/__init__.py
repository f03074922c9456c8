"""Who runs which trials, when and where? Workers, packs, launchers, halving."""

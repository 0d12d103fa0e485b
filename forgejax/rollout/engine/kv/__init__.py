"""Which page holds what: bookkeeping on the host of the keys and values on the device."""

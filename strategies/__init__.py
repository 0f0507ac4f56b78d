"""One module per strategy. Each is found by its presence here: nothing lists them by hand."""

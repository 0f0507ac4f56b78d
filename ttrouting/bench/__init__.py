"""What does a strategy cost beside the bare model, the paper's straightforward version, and a count of operations?"""

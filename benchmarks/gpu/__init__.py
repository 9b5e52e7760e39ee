"""The first day on a card: what has to run there, in slices that each end within ten minutes."""

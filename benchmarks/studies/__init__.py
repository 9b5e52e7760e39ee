"""What the studies share: a small model on the flights of the demo, its batches, and tables of means and spreads."""

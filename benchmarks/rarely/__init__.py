"""What is left of a weighting of gradients whose Gram matrix is made in one step of k, on the flights of the demo."""

"""The contenders: what a user would pick instead, and the same work by mtlkernels, all with the same weights."""

"""A model of what launches would take on a GPU, from their compiled code. No kernel has run on one."""

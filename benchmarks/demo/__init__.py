"""The demo: a deepctr-torch model on real data, trained and served as it is and after ``mtlkernels.convert``."""

"""The demo: models of two libraries on real data, as they are and after ``mtlkernels.convert``, and under PCGrad."""

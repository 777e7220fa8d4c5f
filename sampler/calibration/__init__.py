"""What is ordinary on a model: the data, how it is measured, and which model it belongs to."""

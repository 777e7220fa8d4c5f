"""The commands of the product, one file each: they read options, call one function, and say what came out."""

"""One reader of prompts, of captions and their training images, and of pictures with the prompts that they were made from."""

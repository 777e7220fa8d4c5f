"""Copies of training images: measures of similarity, the index of training images, audits of captions, judging of pictures."""

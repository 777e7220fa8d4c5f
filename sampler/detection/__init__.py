"""The basin score, and verdicts by it: does a picture look like a copy of a training image?"""

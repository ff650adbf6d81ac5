"""Augmentation: from random draws to integers, and from images and integers to views."""

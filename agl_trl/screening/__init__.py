"""Screening: which rows of a training set ask for what is to be refused, and answer it."""

"""Captions made by machines: proposed beside the captions that are there, and put in their place by a person only.

`enums options providers asking shrinking selectors recording job services`, in the order in which they build on each
other. Programs of our own on a device are runs: runs/captioning.py.
"""

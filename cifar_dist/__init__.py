"""Distributed training of GoogLeNet on CIFAR-10."""

__version__ = "0.1.0"

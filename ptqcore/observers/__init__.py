"""Observers: ranges from data."""

from ptqcore.observers.base import Observer, ObserverOptions
from ptqcore.observers.minmax import MinMax
from ptqcore.observers.moving_average import MovingAverage
from ptqcore.observers.mse import MSE
from ptqcore.observers.percentile import Percentile

__all__ = ["MSE", "MinMax", "MovingAverage", "Observer", "ObserverOptions", "Percentile"]

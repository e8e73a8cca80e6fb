"""Looking at a network: is it close to a differential equation, and does rebuilding its states suit it?"""

from .diagnosis import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose"]

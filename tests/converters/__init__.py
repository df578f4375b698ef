"""Tests of mm-convert."""

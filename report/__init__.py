"""Runs on disk to rows, tables and pictures. Imports no torch."""

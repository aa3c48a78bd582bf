"""Recipes: lists of programs and their flags that make the tables of README.md and docs/.

A module has one recipe, whose docstring says command, time and expected numbers. The program
`recipe` runs one by its name.
"""

"""A report as one HTML page: tables of every number, and plots where matplotlib is installed.

elements.py      tables, lists and sections; escapes all that they are given
figure.py        matplotlib figures as SVG inside the page
curves.py        learning curves
signal.py        signal to quantisation noise by stage
histograms.py    what enters linear layers, by stage
sensitivity.py   what each block's quantisers cost
outcome.py       what was found, decided, written and checked, and with which settings
page.py          the page
write.py         the files, by the endings of their names
"""

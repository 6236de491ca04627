"""A page to watch a run: one file of HTML in its directory, which needs no server and no network.

read.py          what is known about a run, from its files
chart.py         curves as plain SVG
write.py         the sections of the page
template.html    its frame, style and script
"""

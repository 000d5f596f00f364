"""The web page of `crossflow demo`: a file per tab, over loaded pipelines. Its command alone imports it, since it
imports gradio.
"""

"""The whole page: its masthead, a tab for whatever is there to show, and the server behind it."""

import html
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import gradio as gr

from crossflow.demo import compare_tab, evaluation_tab, latents_tab, runs_tab, sampling_tab, steps_tab
from crossflow.demo.evaluations import list_evaluations
from crossflow.demo.guard import Guard
from crossflow.demo.models import Models
from crossflow.demo.parts import Site
from crossflow.demo.style import SHEET, theme

TITLE = "crossflow"
CACHE = "GRADIO_TEMP_DIR"
"""The variable that says where gradio keeps the files of visitors: a process serves a single page."""
DELETE_EVERY, DELETE_AFTER = 600, 3600
"""Seconds: files of visitors are deleted when they are older than the second."""
MAX_SESSIONS = 500


def build(site: Site) -> gr.Blocks:
    """The page of loaded models and a folder of runs."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(DELETE_EVERY, DELETE_AFTER)) as page:
        gr.HTML(_masthead(site.models), elem_id="masthead")
        with gr.Tabs():
            for models in site.models.by_task.values():
                sampling_tab.build(site, models)
            if site.models.all:
                latents_tab.build(site)
                steps_tab.build(site)
            if compare_tab.comparable(site):
                compare_tab.build(site)
            if site.runs is not None:
                runs_tab.build(site, page, site.runs)
            if list_evaluations(site.runs, site.models):
                evaluation_tab.build(site, page)
    page.queue(default_concurrency_limit=4, max_size=site.limits.waiting, api_open=False)
    return page


def _masthead(models: Models) -> str:
    what = "One flow from the latent of a source to that of its output: no noise to start from, no extra conditioning."
    loaded = ", ".join(html.escape(model.name) for model in models.all)
    shown = f" Loaded: {loaded}." if loaded else ""
    return f"<h1>cross<i>flow</i></h1><p>{what}{shown}</p>"


class Server:
    """A running page. Its files lie in a folder of its own, which `close` removes."""

    def __init__(
        self,
        models: Models,
        runs: Path | None = None,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        auth: tuple[str, str] | None = None,
    ) -> None:
        self._stack = ExitStack()
        cache = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="crossflow-demo-"))
        before = os.environ.get(CACHE)
        os.environ[CACHE] = cache  # gradio asks for it again and again
        self._stack.callback(lambda: os.environ.pop(CACHE) if before is None else os.environ.update({CACHE: before}))
        site = Site(models, Path(cache), runs)
        self.page = build(site)
        self._stack.callback(self.page.close, verbose=False)
        options = {"cache": cache, "max_body": site.limits.body, "max_upload": site.limits.upload}
        guard = (Guard, (), options)  # class, arguments and keywords, which is all that a starlette Middleware holds
        _, self.url, _ = self.page.launch(
            server_name=host, server_port=port, auth=auth, theme=theme(), css_paths=SHEET, quiet=True,
            prevent_thread_lock=True, show_error=False, share=False, footer_links=["api"], run_history=False,
            ssr_mode=False, mcp_server=False, enable_monitoring=False, max_file_size=site.limits.upload,
            state_session_capacity=MAX_SESSIONS, app_kwargs={"middleware": [guard]},
        )  # fmt: skip

    def close(self) -> None:
        """Stops the server and removes its files."""
        self._stack.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

"""The look of the page: a theme of system fonts, warm greys and one accent, and its style sheet."""

from pathlib import Path

import gradio as gr

SHEET = Path(__file__).with_name("style.css")
ACCENT = gr.themes.Color(
    name="petrol", c50="#eef9f7", c100="#d3f0ec", c200="#a9e0da", c300="#74cac2", c400="#3fada6", c500="#1c908a",
    c600="#0f7570", c700="#0e5d5a", c800="#104b49", c900="#113e3d", c950="#032525",
)  # fmt: skip
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", "Menlo", "monospace")


def theme() -> gr.themes.Base:
    """The theme. Its fonts are names alone: nothing is loaded, from here or from elsewhere."""
    base = gr.themes.Base(
        primary_hue=ACCENT,
        secondary_hue=ACCENT,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_md,
        text_size=gr.themes.sizes.text_md,
        font=SANS,
        font_mono=MONO,
    )
    return base.set(
        body_background_fill="#fdfcfb",
        body_background_fill_dark="#171514",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_padding="4px 0",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_text_color="*body_text_color_subdued",
        block_title_text_weight="600",
        block_title_text_color="*body_text_color",
        panel_border_width="0px",
        input_background_fill="white",
        input_background_fill_dark="#211e1c",
        input_border_width="1px",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
    )

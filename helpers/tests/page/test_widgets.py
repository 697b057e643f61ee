"""A control redraws its figure, and goes on working after a drawing that failed."""

import html

from helpers.page import figures, widgets
from helpers.tests import reading

import matplotlib.pyplot as plt
import nbformat
import pytest
from IPython.utils.capture import capture_output
from ipywidgets import FloatSlider, IntSlider


def draw_share(experts: int) -> None:
    """Fails where 96 experts cannot be shared out equally."""
    fig, ax = plt.subplots()
    if 96 % experts:
        raise ValueError(f"96 experts on {experts} GPUs:\nnot <equal>")
    ax.bar([0], [96 // experts])
    figures.show(fig, f'One bar: "{96 // experts}" experts')


@pytest.fixture
def displayed(shell, monkeypatch) -> list:
    """The widgets that `what_if` displays, in order."""
    seen = []
    monkeypatch.setattr(
        widgets, "show_widget", lambda widget, hint: seen.append(widget)
    )
    return seen


@pytest.fixture
def control() -> IntSlider:
    return IntSlider(value=8, min=0, max=100)


@pytest.fixture
def picture(control, displayed) -> widgets.Shown:
    place = widgets.follow([control], draw_share)
    [box] = displayed
    assert box.children == (control,)
    return place


def shows(picture: widgets.Shown, alt: str) -> bool:
    return (
        picture.value.startswith("<img ")
        and f'alt="{html.escape(alt)}"' in picture.value
        and "data:image/png;base64,iVBOR" in picture.value
    )


def test_the_figure_follows_its_control(control, picture):
    assert shows(picture, 'One bar: "12" experts')
    control.value = 4
    assert shows(picture, 'One bar: "24" experts')


def test_a_failed_redraw_says_why_in_the_picture_and_leaves_the_control_alive(
    control, picture
):
    control.value = 50
    assert "Cannot be drawn: 96 experts on 50 GPUs: not &lt;equal&gt;" in picture.value
    assert "\n" not in picture.value
    assert "<img" not in picture.value, "an old figure below it would mislead"
    control.value = 4
    assert shows(picture, 'One bar: "24" experts')


def test_a_browser_can_type_what_fails_and_go_on(control, picture):
    # the way of a change that comes from the page
    for typed in (50, 51, 0):
        control.set_state({"value": typed})
        assert control.value == typed
        assert "Cannot be drawn: " in picture.value
    control.set_state({"value": 6})
    assert shows(picture, 'One bar: "16" experts')


def test_a_message_is_never_empty(displayed):
    def draw(value: int) -> None:
        if value:
            raise StopIteration
        fig, _ = plt.subplots()
        figures.show(fig, "nothing")

    slider = IntSlider(value=0)
    place = widgets.follow([slider], draw)
    slider.value = 1
    assert "Cannot be drawn: StopIteration" in place.value


def test_without_a_kernel_there_is_a_picture_and_a_hint(shell):
    slider = IntSlider(value=8)
    with capture_output() as caught:
        # a value would be shown below the picture
        assert widgets.what_if(slider, draw_share) is None
    controls, figure = (output.data for output in caught.outputs)
    assert controls["application/vnd.jupyter.widget-view+json"]["model_id"]
    assert controls["text/plain"] == widgets.NO_KERNEL
    assert widgets.NO_KERNEL in controls["text/html"]
    [picture] = reading.pictures(nbformat.v4.new_output("display_data", figure))
    assert picture.alt == figure["text/plain"] == 'One bar: "12" experts'


def test_no_figure_stays_open(control, picture):
    before = plt.get_fignums()
    control.value = 50
    control.value = 4
    assert plt.get_fignums() == before


def test_several_controls(displayed):
    def draw(width: int, height: float) -> None:
        fig, _ = plt.subplots()
        figures.show(fig, f"{width} by {height}")

    width = IntSlider(value=1)
    height = FloatSlider(value=2.0)
    place = widgets.follow([width, height], draw)
    [box] = displayed
    assert box.children == (width, height)
    height.value = 3.5
    assert shows(place, "1 by 3.5")


def test_what_fails_at_once_fails_the_cell(displayed):
    with pytest.raises(ValueError, match="not <equal>"):
        widgets.what_if(IntSlider(value=50), draw_share)
    assert displayed == []


def test_a_drawing_that_shows_nothing_is_told_what_is_missing(displayed):
    with pytest.raises(ValueError, match=r"figures\.show"):
        widgets.what_if(IntSlider(value=1), lambda value: None)

"""The kinds of panels that our dashboards use, made with grafana-foundation-sdk's builders."""

from typing import TypeVar

from grafana_foundation_sdk.builders import barchart, common, heatmap, statetimeline, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery as Target
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard, prometheus
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode

SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
GRID = 24
DASHED = "/^(reference|threshold|limit|objective)/"


Panel = timeseries.Panel | statetimeline.Panel | heatmap.Panel | barchart.Panel
P = TypeVar("P", timeseries.Panel, statetimeline.Panel, heatmap.Panel, barchart.Panel)


def query(expression: str, legend: str = "") -> Dataquery:
    return Dataquery().expr(expression).legend_format(legend).datasource(SOURCE)


def titled(panel: P, title: str, about: str, *queries: Dataquery, width: int = 8, height: int = 8) -> P:
    """Give a panel a title and queries. `about` is its help text: what is healthy, and how to read the panel."""
    targets: list[Builder[Target]] = [q.ref_id(chr(ord("A") + i)) for i, q in enumerate(queries)]
    return panel.title(title).description(about).datasource(SOURCE).targets(targets).span(width).height(height)


def lines(
    title: str, about: str, *queries: Dataquery, unit: str = "short", minimum: float | None = 0, width: int = 8
) -> timeseries.Panel:
    """A panel of series over time. Legends that begin with reference, threshold, limit or objective are dashed."""
    dashes = dashboard.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [6, 6]})
    panel = (
        timeseries.Panel()
        .unit(unit)
        .line_width(2)
        .fill_opacity(0)
        .show_points(options.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(options.LegendDisplayMode.LIST)
            .placement(options.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING))
        .override_by_regexp(DASHED, [dashes])
    )
    return titled(panel if minimum is None else panel.min(minimum), title, about, *queries, width=width)


def states(title: str, about: str, query: Dataquery) -> statetimeline.Panel:
    """A panel with one row for each series, coloured while it has a value."""
    panel = (
        statetimeline.Panel()
        .show_value(options.VisibilityMode.NEVER)
        .merge_values(True)
        .legend(common.VizLegendOptions().show_legend(False).display_mode(options.LegendDisplayMode.HIDDEN))
        .color_scheme(builders.FieldColor().mode(dashboard.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
    )
    return titled(panel, title, about, query, width=GRID, height=6)


def by_rank(title: str, about: str, expression: str, *, repeat: str, width: int) -> heatmap.Panel:
    """A heatmap of one series for each rank over time, coloured between 0 and 1.5.

    Time series whose names are numbers become rows in their order. format=heatmap would treat them as cumulative
    buckets: it subtracts neighbours and clamps at 0.
    """
    rows = query(expression, "{{rank}}").format(prometheus.PromQueryFormat.TIME_SERIES)
    colours = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("RdYlBu").steps(64).min(0).max(1.5)
    panel = (
        heatmap.Panel()
        .calculate(False)
        .cell_gap(0)
        .show_legend()
        .mode(options.TooltipDisplayMode.SINGLE)
        .show_color_scale(True)
        .color(colours.reverse(False).fill("dark-orange"))
        .rows_frame(heatmap.RowsHeatmapOptions().layout(options.HeatmapCellLayout.AUTO))
        .y_axis(heatmap.YAxisConfig().axis_placement(options.AxisPlacement.LEFT))
        .repeat(repeat)
        .repeat_direction("v")
    )
    return titled(panel, title, about, rows, width=width)


def bars_by_rank(title: str, about: str, expression: str, *, width: int) -> barchart.Panel:
    """A bar chart of the present values at each rank, on a logarithmic scale."""

    def rank_as(kind: str) -> dashboard.DataTransformerConfig:
        conversions = [{"targetField": "rank", "destinationType": kind}]
        return dashboard.DataTransformerConfig(id_val="convertFieldType", options={"conversions": conversions})

    now = query(expression).instant().format(prometheus.PromQueryFormat.TABLE)
    logarithmic = common.ScaleDistributionConfig().type(options.ScaleDistribution.LOG).log(10)
    panel = (
        barchart.Panel()
        .x_field("rank")
        .legend(common.VizLegendOptions().show_legend(False).display_mode(options.LegendDisplayMode.HIDDEN))
        .scale_distribution(logarithmic)
        .transformations(
            [
                rank_as("number"),
                dashboard.DataTransformerConfig(id_val="sortBy", options={"sort": [{"field": "rank"}]}),
                rank_as("string"),
                dashboard.DataTransformerConfig(id_val="organize", options={"excludeByName": {"Time": True}}),
            ]
        )
    )
    return titled(panel, title, about, now, width=width)


def variable(name: str, label: str, values: str) -> builders.QueryVariable:
    """A dashboard variable that chooses some or all values of a label. `values` is "label_values(metric, label)"."""
    return (
        builders.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": values, "refId": name})
        .multi(True)
        .include_all(True)
        .current(dashboard.VariableOption(text="All", value="$__all"))
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
    )


def board(uid: str, title: str, *content: str | Panel | builders.QueryVariable) -> dashboard.Dashboard:
    """A dashboard of variables, rows (a string is a row's title) and panels, laid out in their order."""
    result = (
        builders.Dashboard(title)
        .uid(uid)
        .tags(["fullrank"])
        .editable()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .refresh("30s")
        .time("now-3h", "now")
        .timezone("browser")
        .link(
            builders.DashboardLink("fullrank")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags(["fullrank"])
            .keep_time(True)
        )
        .with_variable(builders.DatasourceVariable("datasource").type("prometheus").label("Data source"))
    )
    for item in content:
        if isinstance(item, builders.QueryVariable):
            result.with_variable(item)
        elif isinstance(item, str):
            result.with_row(builders.Row(item))
        else:
            result.with_panel(item)
    built = result.build()
    for number, panel in enumerate(built.panels or [], 1):
        panel.id_val = number
    return built

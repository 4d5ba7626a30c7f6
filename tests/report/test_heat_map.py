"""Modules find their row and column, whatever the architecture calls them."""

from lorakit.report.heat_map import LEVELS, grids, heat_maps
from lorakit.report.numbers import figures


def test_rows_are_layers_by_number_and_columns_kinds_of_module():
    names = ("self_attn.q_proj", "mlp.up_proj")
    grid, other = grids(["lm_head", *(f"model.layers.{n}.{k}" for n in (10, 9, 0) for k in names)])
    assert (grid.title, grid.columns) == ("model.layers", ["q_proj", "up_proj"])
    assert [name for name, _ in grid.rows] == ["0", "9", "10"]
    assert grid.rows[2][1][1] == ["model.layers.10.mlp.up_proj"]
    assert (other.title, other.columns, other.rows) == ("", ["lm_head"], [("", [["lm_head"]])])


def test_kinds_of_the_same_last_name_are_told_apart():
    kinds = ["attention.self.query", "attention.output.dense", "output.dense", "intermediate.dense"]
    (grid,) = grids(f"encoder.layer.{n}.{kind}" for n in range(2) for kind in kinds)
    assert grid.columns[0] == "query"
    assert len(set(grid.columns)) == 4
    assert "attention.output.dense" in grid.columns


def test_an_encoder_and_a_decoder_are_two_maps():
    maps = grids(
        f"{part}.block.{n}.layer.0.SelfAttention.q"
        for part in ("encoder", "decoder")
        for n in range(2)
    )
    assert [grid.title for grid in maps] == ["encoder.block", "decoder.block"]
    assert maps[0].columns == ["q"]


def test_experts_of_a_layer_share_a_cell_which_is_their_mean():
    values = {f"model.layers.0.mlp.experts.{n}.up_proj": float(n) for n in range(4)}
    (heat,) = heat_maps(values, 3.0, figures, "‖ΔW‖")
    ((_, (cell,)),) = heat.rows
    assert cell is not None
    assert cell.text == "1.50"
    assert cell.title.startswith("mean of 4 modules like model.layers.0.mlp.experts.0.up_proj")


def test_shades_go_evenly_from_0_to_the_top_and_gaps_stay_empty():
    values = {"l.0.a": 0.0, "l.0.b": 10.0, "l.1.a": 5.0}
    (heat,) = heat_maps(values, 10.0, figures, "rank")
    (_, first), (_, second) = heat.rows
    levels = [cell.level for cell in (*first, *second) if cell]
    assert levels == [0, LEVELS - 1, LEVELS // 2]
    assert second[1] is None
    (flat,) = heat_maps({"l.0.a": 0.0}, 0.0, figures, "rank")
    assert flat.rows[0][1][0].level == 0  # type: ignore[union-attr]

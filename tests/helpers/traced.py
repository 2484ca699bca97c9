"""What a model's training steps were traced to."""

import tensorflow as tf


def ops_of(model):
    """The types of the ops of the traced training steps, functions that they call included."""
    function = model.train_function  # Keras 3.6 has the traced function itself here, later versions around it
    around = [cell.cell_contents for cell in getattr(function, "__closure__", ())]
    (step,) = [f for f in (function, *around) if isinstance(f, tf.types.experimental.PolymorphicFunction)]
    graphs = [f.graph.as_graph_def() for f in step._list_all_concrete_functions()]
    nodes = [node for graph in graphs for node in graph.node]
    return {node.op for node in nodes} | {
        node.op for graph in graphs for f in graph.library.function for node in f.node_def
    }

"""minGRU over images, signals and volumes. Each class only sets `num_space_dims` and the docstring."""

from .conv import MinConv, MinConvCell


class MinConv1dGRU(MinConv):
    """Stacked minGRU of one-dimensional convolutions, over sequences of signals; space is one size.

    As `mingru.MinConv2dGRU` in all else.

    Example:
        >>> rnn = mingru.MinConv1dGRU(input_dims=2, hidden_dims=8, kernel_size=5, padding=4, dilation=2)
        >>> out, states = rnn(torch.randn(3, 20, 2, 100))
        >>> out.shape, states[0].shape
        (torch.Size([3, 20, 8, 100]), torch.Size([3, 1, 8, 100]))
    """

    num_space_dims = 1


class MinConv2dGRU(MinConv):
    """Stacked minimal gated recurrent units with convolutions for linear maps, over sequences of images.

    Each layer and direction computes, at every place of the image and from its input x_t,

        z_t = sigma(W_z * x_t + b_z)
        h_t = (1 - z_t) h_{t-1} + z_t g(W_h * x_t + b_h)

    where * is a convolution over space, z the gate that admits the candidate, h the state, and g keeps the candidate
    positive (`mingru.functional.g`). Time is parallel: all steps are convolved as one batch.

    An argument that may differ from layer to layer is also taken as a list with one entry for each; a tuple has one
    number for each dimension of space. So `kernel_size=[3, (1, 5)]` is 3 x 3 in the first layer, 1 x 5 in the second.

    Args:
        input_dims: C, channels of the input; at least 1.
        hidden_dims: H, channels of the state; at least 1. An int, or a list.
        kernel_size: of the convolution. An int, a tuple, or a list of these; so are stride, padding and dilation.
        num_layers: L; layer l + 1 takes the output of layer l.
        stride: steps of the kernel over space.
        padding: places of 0 on each side of space; or "same", which keeps its size and needs a stride of 1.
        dilation: steps between the places that the kernel reads.
        groups: each part of the channels reads its own part of the input alone, in every layer (but for the norm). It
            divides `input_dims` and every entry of `hidden_dims`. Over a bidirectional layer, the forward channels come
            first. With more than one, the pre-activations are copied once.
        bias: whether the convolutions have one.
        dropout: probability in [0, 1] with which each element of each layer's output but the last's is dropped, in
            training only.
        bidirectional: a second direction in each layer, with weights of its own, reads from the end; D = 2, else 1.
        residual: adds each layer's input to its output; where channels differ, or space could, through a convolution of
            the same kernel, stride, padding, dilation and groups, without bias. The state is the one without it.
        norm: "group" on the input of every layer, each step for itself, or None. It has as many groups, up to 32, as
            share the channels evenly with 16 or more to each: one, so, for fewer than 32 channels.
        candidate: "positive": g, the paper's log-space form; "linear": v itself, its plain form; "tanh".
        learn_initial_state: makes the state that stands for 'nothing seen yet' a parameter: a number for each layer,
            direction and channel, the same at every place, so that images may have any size.
        batch_first: x is (B, S, C, *space), as against (S, B, C, *space). No data is copied for either.
        device: of the parameters.
        dtype: of the parameters, a floating one.

    Called with:
        x: (B, S, C, *space), or (S, B, C, *space) with `batch_first=False`; dtype and device of the parameters. B or S
            may be 0.
        h: states before the first step, any real numbers: a list with a tensor for each layer and direction, which
            expands to (B, 1, H, *space) of that layer; dtype of x, or float32 beside half-width x. Index l * D is layer
            l forward, l * D + 1 backward. Default: the 'zero' state g(0) = 0.5 (0 where `candidate` is not "positive"),
            or the learned one.
        reset: bool, the first two dimensions of x. Where true, the state is put back to the zero or learned state
            before that step consumes its input. The backward direction is cut at the same place: between that step and
            the one before it.

    Returns:
        A tensor and a list. `out`, (B, S, D * H, *space) or (S, B, D * H, *space), is the last layer's output, both
        directions in the order of time; a space of size n comes out of each layer as
        (n + 2 padding - dilation (kernel_size - 1) - 1) // stride + 1. The list has each layer's and direction's state
        after its last step, (B, 1, H, *space), so that `rnn(x2, states)` continues. All are differentiable.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a size, shape, device, norm, candidate or dropout that does not fit; a list of another length than
            the layers; an image too small for a kernel.

    Parameters: `layers.{l}.conv.weight` (2H, C / groups, *kernel_size), gate rows first, candidate rows second, and
    `.bias` (2H); with groups, that order within each group, whose rows lie together. `layers.{l}.conv_reverse`,
    `.norm`, `.align` (the residual's map, (D * H, C / groups, *kernel_size); with groups, each has its forward rows,
    then its backward ones) and `.initial_state` (D, 1, 1, H, 1, 1) where asked for. Drawn as `torch.nn.Conv2d` draws.

    Numerics: as of `mingru.MinGRU`, once the convolution is done. On the CPU and without a gradient, a long input is
    convolved block by block, unless the convolution has hooks: much quicker, in less memory, and the same but for
    rounding.

    Differs from the convolutional GRU in that no convolution reads the state: a place learns of its neighbours' past
    through the layers above alone.

    Example:
        >>> rnn = mingru.MinConv2dGRU(3, [16, 32], kernel_size=3, num_layers=2, stride=[1, 2], padding=1)
        >>> out, states = rnn(torch.randn(4, 10, 3, 32, 32))
        >>> out.shape, [state.shape for state in states]
        (torch.Size([4, 10, 32, 16, 16]), [torch.Size([4, 1, 16, 32, 32]), torch.Size([4, 1, 32, 16, 16])])
        >>> out, states = rnn(torch.randn(4, 1, 3, 32, 32), states)  # the next image

    Source: Feng et al. 2024, "Were RNNs All We Needed?", section 3.1; Ballas et al. 2016, "Delving Deeper into
    Convolutional Networks for Learning Video Representations", section 3.1, for the convolutional GRU.
    """

    num_space_dims = 2


class MinConv3dGRU(MinConv):
    """Stacked minGRU of three-dimensional convolutions, over sequences of volumes.

    As `mingru.MinConv2dGRU` in all else.

    Example:
        >>> rnn = mingru.MinConv3dGRU(input_dims=1, hidden_dims=4, kernel_size=3, padding=1)
        >>> out, states = rnn(torch.randn(2, 5, 1, 8, 8, 8))
        >>> out.shape, states[0].shape
        (torch.Size([2, 5, 4, 8, 8, 8]), torch.Size([2, 1, 4, 8, 8, 8]))
    """

    num_space_dims = 3


class MinConv1dGRUCell(MinConvCell):
    """One step of a one-layer `mingru.MinConv1dGRU`; called and built as `mingru.MinConv2dGRUCell` is.

    Example:
        >>> cell = mingru.MinConv1dGRUCell(input_dims=2, hidden_dims=8, kernel_size=3, padding=1)
        >>> cell(torch.randn(4, 2, 50)).shape
        torch.Size([4, 8, 50])
    """

    num_space_dims = 1


class MinConv2dGRUCell(MinConvCell):
    """One step of a one-layer `mingru.MinConv2dGRU`, for loops of the caller's own.

    Args:
        input_dims: as of `mingru.MinConv2dGRU`, for its only layer.
        hidden_dims: as of `mingru.MinConv2dGRU`, for its only layer.
        kernel_size: as of `mingru.MinConv2dGRU`, for its only layer.
        stride: as of `mingru.MinConv2dGRU`, for its only layer.
        padding: as of `mingru.MinConv2dGRU`, for its only layer.
        dilation: as of `mingru.MinConv2dGRU`, for its only layer.
        groups: as of `mingru.MinConv2dGRU`, for its only layer.
        bias: as of `mingru.MinConv2dGRU`, for its only layer.
        norm: as of `mingru.MinConv2dGRU`.
        candidate: as of `mingru.MinConv2dGRU`.
        learn_initial_state: as of `mingru.MinConv2dGRU`.
        device: as of `mingru.MinConv2dGRU`.
        dtype: as of `mingru.MinConv2dGRU`.

    Called with:
        x: (B, C, *space), or (C, *space) without a batch.
        h: the state before this step, any real numbers, which expands to (B, H, *space), or to (H, *space) without a
            batch, where space is that of the output; dtype of x, or float32 beside half-width x. Default: as of
            `MinConv2dGRU`.
        reset: bool (B), or () without a batch: where true, the state is put back before this step.

    Returns:
        The state after this step, (B, H, *space) or (H, *space).

    Raises and parameters: as of `MinConv2dGRU` with one layer; `load_state_dict` takes either's.

    Example:
        >>> cell = mingru.MinConv2dGRUCell(input_dims=3, hidden_dims=8, kernel_size=3, stride=2)
        >>> h = cell(torch.randn(4, 3, 9, 9))
        >>> h = cell(torch.randn(4, 3, 9, 9), h)
        >>> h.shape
        torch.Size([4, 8, 4, 4])
    """

    num_space_dims = 2


class MinConv3dGRUCell(MinConvCell):
    """One step of a one-layer `mingru.MinConv3dGRU`; called and built as `mingru.MinConv2dGRUCell` is.

    Example:
        >>> cell = mingru.MinConv3dGRUCell(input_dims=1, hidden_dims=4, kernel_size=(1, 3, 3))
        >>> cell(torch.randn(2, 1, 5, 6, 7)).shape
        torch.Size([2, 4, 5, 4, 5])
    """

    num_space_dims = 3

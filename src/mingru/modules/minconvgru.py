"""minGRU over sequences of signals, images and volumes. Each class only sets `num_space_dims` and the docstring."""

from .convolutional import ConvCell, Convolutional


class MinConv1dGRU(Convolutional):
    """Apply a stack of minGRU layers with one-dimensional convolutions to a sequence of signals.

    Arguments, inputs and outputs are those of `mingru.MinConv2dGRU`; `space` is a single size.

    Examples:
        >>> rnn = mingru.MinConv1dGRU(input_dims=2, hidden_dims=8, kernel_size=5, padding=4, dilation=2)
        >>> out, states = rnn(torch.randn(3, 20, 2, 100))
        >>> out.shape, states[0].shape
        (torch.Size([3, 20, 8, 100]), torch.Size([3, 1, 8, 100]))
    """

    num_space_dims = 1


class MinConv2dGRU(Convolutional):
    """Apply a stack of minGRU layers with two-dimensional convolutions to a sequence of images.

    All time steps are computed in parallel: they are convolved as one batch. Each layer and direction computes, at
    every pixel,

        z_t = sigma(W_z * x_t + b_z)
        h_t = (1 - z_t) h_{t-1} + z_t g(W_h * x_t + b_h)

    where `*` is a spatial convolution, x_t the input of the layer, z_t the update gate and h_t the state.
    `mingru.functional.g` keeps the candidate positive.

    `hidden_dims`, `kernel_size`, `stride`, `padding` and `dilation` accept a list with one number for each layer, and
    all but `hidden_dims` a tuple with one number for each spatial dimension: `kernel_size=[3, 5]` is 3 x 3 in the first
    layer and 5 x 5 in the second, and `kernel_size=(3, 5)` is 3 x 5 in all layers. For tuples that differ between
    layers, stack one-layer modules in a `mingru.Stack`.

    Args:
        input_dims: Number of input channels, C.
        hidden_dims: Number of state channels, H. An int or a list.
        kernel_size: Size of the convolution kernel. An int, a tuple, or a list of ints.
        num_layers: Number of stacked layers, L. Layer l + 1 takes the output of layer l.
        stride: Stride of the convolution. An int, a tuple, or a list of ints.
        padding: Number of zeros added on each side of each spatial dimension, or "same", which keeps the spatial size
            and needs a stride of 1. An int, a tuple, "same", or a list of ints and "same".
        dilation: Distance between the pixels that the kernel reads. An int, a tuple, or a list of ints.
        bias: If False, the convolutions have no bias.
        dropout: Dropout probability, from 0 to 1, on the output of every layer except the last. Used in training only.
        bidirectional: If True, each layer has a reverse direction with its own weights, which runs from the last step
            to the first. D is 2 if True, otherwise 1.
        residual: If True, add each layer's input to its output. If the channels differ, or if padding or stride may
            change the spatial size, the input goes through a convolution with the layer's kernel, stride, padding
            and dilation, without bias. The returned state does not include the residual.
        norm: "group" or None: group norm of each layer's input, separate for each step. The number of groups is the
            largest divisor of the channel count that is at most 32 and leaves at least 16 channels per group. Below 32
            channels it is 1.
        candidate: Activation of the candidate: "positive" (g, as in the paper's log-space version), "linear" (none, as
            in the paper's vanilla version) or "tanh". Default: "positive" if `gate` is "sigmoid", otherwise "tanh".
        gate: "sigmoid", "signed", "rotation", "quaternion" or "mixed", see `mingru.MinGRU`, or a list with one for
            each layer. "rotation" needs an even number of state channels, "quaternion" a multiple of 4, and "mixed" a
            multiple of 8.
        learn_initial_state: If True, the initial state is a parameter, with one number for each layer, direction and
            channel. All pixels share it, so that images may have any size.
        memory: Number of time steps that a state lasts at first, see `mingru.MinGRU`.
        batch_first: If False, x is `(S, B, C, *space)` instead of `(B, S, C, *space)`. Neither order needs a copy of x.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.

    Inputs:
        - **x**: Sequence, `(B, S, C, *space)`, or `(S, B, C, *space)` if `batch_first` is False. It has the dtype and
          device of the parameters. B or S may be 0.
        - **h**: States before the first step, any real numbers: a list with one tensor for each layer and direction,
          expandable to `(B, 1, H, *space)`, where space is that of the layer's output. Index l * D is layer l forward,
          l * D + 1 its reverse direction. The dtype is that of x, or float32 if x is bfloat16 or float16. Default: the
          initial state, as in `mingru.MinGRU`.
        - **reset**: Boolean mask, (B, S) or (S, B) like x. Where True, the state is set to the initial state before
          that step. The reverse direction is reset at the same boundary, between that step and the previous one.

    Outputs:
        - **out**: Output of the last layer, `(B, S, D * H, *space)` or `(S, B, D * H, *space)`, with both directions in
          the order of time. Each layer changes a spatial size n to `(n + 2 * padding - dilation * (kernel_size - 1) -
          1) // stride + 1`.
        - **states**: List of the states of each layer and direction after its last step, `(B, 1, H, *space)`, so that
          `rnn(x2, states)` continues the sequence.

        All outputs are differentiable.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A size, shape, device, norm, candidate, gate or dropout is invalid; a list does not have one entry
            for each layer; or an image is too small for a kernel.

    State dict:
        - `layers.{l}.conv.weight` `(2H, C, *kernel_size)` and `layers.{l}.conv.bias` (2H,): gate rows first, then
          candidate rows. They are initialized as in `torch.nn.Conv2d`.
        - `layers.{l}.align.weight` `(D * H, C, *kernel_size)`: the residual's convolution.
        - `layers.{l}.initial_state` (D, 1, 1, H, 1, 1).
        - `layers.{l}.conv_reverse` and `layers.{l}.norm`.

        All entries except those of `conv` exist only if an option needs them.

    Numerics:
        As in `mingru.MinGRU` after the convolution. On the CPU, without gradients and without hooks on the
        convolution, a long input is convolved in blocks. This is faster, takes less memory, and differs only in
        rounding.

    Unlike in the convolutional GRU of Ballas et al., no convolution reads the state. A pixel therefore receives
    information about its neighbors' past only in higher layers.

    Examples:
        >>> rnn = mingru.MinConv2dGRU(3, [16, 32], kernel_size=3, num_layers=2, stride=[1, 2], padding=1)
        >>> out, states = rnn(torch.randn(4, 10, 3, 32, 32))
        >>> out.shape, [state.shape for state in states]
        (torch.Size([4, 10, 32, 16, 16]), [torch.Size([4, 1, 16, 32, 32]), torch.Size([4, 1, 32, 16, 16])])
        >>> out, states = rnn(torch.randn(4, 1, 3, 32, 32), states)  # the next image

    References:
        - Feng et al. 2024, "Were RNNs All We Needed?", section 3.1.
        - Ballas et al. 2016, "Delving Deeper into Convolutional Networks for Learning Video Representations", section
          3.1, for the convolutional GRU.
    """

    num_space_dims = 2


class MinConv3dGRU(Convolutional):
    """Apply a stack of minGRU layers with three-dimensional convolutions to a sequence of volumes.

    Arguments, inputs and outputs are those of `mingru.MinConv2dGRU`.

    Examples:
        >>> rnn = mingru.MinConv3dGRU(input_dims=1, hidden_dims=4, kernel_size=3, padding=1)
        >>> out, states = rnn(torch.randn(2, 5, 1, 8, 8, 8))
        >>> out.shape, states[0].shape
        (torch.Size([2, 5, 4, 8, 8, 8]), torch.Size([2, 1, 4, 8, 8, 8]))
    """

    num_space_dims = 3


class MinConv1dGRUCell(ConvCell):
    """Compute one step of a one-layer `MinConv1dGRU`.

    Arguments, inputs and outputs are those of `mingru.MinConv2dGRUCell`.

    Examples:
        >>> cell = mingru.MinConv1dGRUCell(input_dims=2, hidden_dims=8, kernel_size=3, padding=1)
        >>> cell(torch.randn(4, 2, 50)).shape
        torch.Size([4, 8, 50])
    """

    num_space_dims = 1


class MinConv2dGRUCell(ConvCell):
    """Compute one step of a one-layer `MinConv2dGRU`, for loops in your own code.

    Arguments are explained in `mingru.MinConv2dGRU`.

    Args:
        input_dims: Number of input channels, C.
        hidden_dims: Number of state channels, H.
        kernel_size: Size of the convolution kernel.
        stride: Stride of the convolution.
        padding: Zeros added on each side of each spatial dimension, or "same".
        dilation: Distance between the pixels that the kernel reads.
        bias: If False, the convolution has no bias.
        norm: "group" or None: norm of the input.
        candidate: "positive" (g), "linear" or "tanh". Default: by `gate`, as in the layer.
        gate: "sigmoid", "signed", "rotation", "quaternion" or "mixed".
        learn_initial_state: If True, the initial state is a parameter.
        memory: Number of time steps that a state lasts at first, see `mingru.MinGRU`.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.

    Inputs:
        - **x**: Input, `(B, C, *space)`, or `(C, *space)` without a batch.
        - **h**: State before the step, any real numbers, expandable to `(B, H, *space)`, or `(H, *space)` without a
          batch, where space is that of the output. The dtype is that of x, or float32 if x is bfloat16 or float16.
          Default: as in `MinConv2dGRU`.
        - **reset**: Boolean mask, (B,), or a scalar without a batch. Where True, the state is set to the initial state
          before the step.

    Outputs:
        - **h'**: State after the step, `(B, H, *space)` or `(H, *space)`.

    State dict:
        As in a one-layer `MinConv2dGRU`: the state_dict of one loads into the other.

    Examples:
        >>> cell = mingru.MinConv2dGRUCell(input_dims=3, hidden_dims=8, kernel_size=3, stride=2)
        >>> h = cell(torch.randn(4, 3, 9, 9))
        >>> h = cell(torch.randn(4, 3, 9, 9), h)
        >>> h.shape
        torch.Size([4, 8, 4, 4])
    """

    num_space_dims = 2


class MinConv3dGRUCell(ConvCell):
    """Compute one step of a one-layer `MinConv3dGRU`.

    Arguments, inputs and outputs are those of `mingru.MinConv2dGRUCell`.

    Examples:
        >>> cell = mingru.MinConv3dGRUCell(input_dims=1, hidden_dims=4, kernel_size=(1, 3, 3))
        >>> cell(torch.randn(2, 1, 5, 6, 7)).shape
        torch.Size([2, 4, 5, 4, 5])
    """

    num_space_dims = 3

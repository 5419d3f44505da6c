// Everything public in one include. Smaller headers compile faster: <capo/engine/tensor.h>, <capo/ops/unary.h>, ...
#pragma once

#include <capo/autograd/autograd.h>
#include <capo/autograd/node.h>
#include <capo/datasets/canvas.h>
#include <capo/datasets/image.h>
#include <capo/datasets/plot.h>
#include <capo/datasets/png.h>
#include <capo/engine/allocator.h>
#include <capo/engine/cpu.h>
#include <capo/engine/device.h>
#include <capo/engine/dtype.h>
#include <capo/engine/error.h>
#include <capo/engine/files.h>
#include <capo/engine/ref.h>
#include <capo/engine/rng.h>
#include <capo/engine/safetensors.h>
#include <capo/engine/sha256.h>
#include <capo/engine/shape.h>
#include <capo/engine/tensor.h>
#include <capo/engine/threads.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>

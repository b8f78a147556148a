#include "train/attention.h"

#include <limits>

namespace indexcache {

namespace {

constexpr double kMasked = -std::numeric_limits<double>::infinity();

// (query, key, head) triples whose scores are in memory at a time: 2 GiB as f32.
constexpr int64_t kTriplesInMemory = int64_t{1} << 29;
// Elements of gathered rows in memory at a time.
constexpr int64_t kGatheredElements = int64_t{1} << 28;

// f32 [H, queries, keys]
torch::Tensor masked_scores(const torch::Tensor& q, const torch::Tensor& k, double scale,
                            const Batch& batch, const Chunk& chunk) {
  const torch::Tensor queries = q.narrow(0, chunk.first, chunk.num_queries()).transpose(0, 1);
  const torch::Tensor keys = k.narrow(0, chunk.first_key, chunk.num_keys()).permute({1, 2, 0});
  return torch::matmul(queries, keys)
      .to(torch::kFloat)
      .mul(scale)
      .masked_fill(hidden_pairs(batch, chunk), kMasked);
}

#if INDEXCACHE_TORCH_AT_LEAST(2, 4)
bool flash_takes(const torch::Tensor& q) {
  return q.is_cuda() && q.scalar_type() != torch::kFloat && q.size(2) % 8 == 0 && q.size(2) <= 256;
}
#endif

}  // namespace

torch::Tensor dense_attention(const torch::Tensor& q, const torch::Tensor& k,
                              const torch::Tensor& v, double scale, const Batch& batch) {
#if INDEXCACHE_TORCH_AT_LEAST(2, 4)
  if (flash_takes(q)) {
    // The kernel wants one head size for all three.
    const int64_t value_dim = v.size(2);
    const torch::Tensor padded = torch::constant_pad_nd(v, {0, q.size(2) - value_dim});
    const auto result = at::_flash_attention_forward(
        q, k, padded, batch.cumulative, batch.cumulative, batch.longest_document,
        batch.longest_document, 0.0, true, false, scale);
    return std::get<0>(result).narrow(2, 0, value_dim);
  }
#endif
  std::vector<torch::Tensor> outputs;
  for (const Chunk& chunk : chunks(batch, kTriplesInMemory / q.size(1))) {
    const torch::Tensor p =
        masked_scores(q, k, scale, batch, chunk).softmax(-1).to(v.scalar_type());
    const torch::Tensor values = v.narrow(0, chunk.first_key, chunk.num_keys()).transpose(0, 1);
    outputs.push_back(torch::matmul(p, values).transpose(0, 1));
  }
  return torch::cat(outputs);
}

torch::Tensor mean_probabilities(const torch::Tensor& q, const torch::Tensor& k, double scale,
                                 const Batch& batch, const Chunk& chunk) {
  torch::NoGradGuard no_grad;
  // Scores stay in the compute type up to the softmax: half the bytes of f32 scores, and this is
  // what a warm-up's time goes into.
  const torch::Tensor queries = q.narrow(0, chunk.first, chunk.num_queries()).mul(scale);
  const torch::Tensor keys = k.narrow(0, chunk.first_key, chunk.num_keys()).permute({1, 2, 0});
  return torch::matmul(queries.transpose(0, 1), keys)
      .masked_fill_(hidden_pairs(batch, chunk), kMasked)
      .softmax(-1, torch::kFloat)
      .mean(0);
}

namespace {

// What both directions of sparse_attention() need of one chunk of queries.
struct Gathered {
  torch::Tensor places;  // i64 [C * k], 0 where nothing is selected
  torch::Tensor rows;    // [C, k, D]
  torch::Tensor p;       // f32 [C, H, k]
};

Gathered gather(const torch::Tensor& q, const torch::Tensor& rows, const torch::Tensor& selection,
                double scale) {
  Gathered g;
  g.places = selection.clamp_min(0).to(torch::kLong).flatten();
  g.rows = rows.index_select(0, g.places).view({selection.size(0), selection.size(1), -1});
  const torch::Tensor scores = torch::bmm(q, g.rows.transpose(1, 2)).to(torch::kFloat).mul_(scale);
  g.p = scores.masked_fill_(selection.lt(0).unsqueeze(1), kMasked).softmax(-1);
  return g;
}

int64_t queries_at_a_time(const torch::Tensor& rows, const torch::Tensor& selection) {
  return std::max<int64_t>(1, kGatheredElements / (selection.size(1) * rows.size(1)));
}

struct SparseAttentionFunction : torch::autograd::Function<SparseAttentionFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context,
                                                const torch::Tensor& q, const torch::Tensor& rows,
                                                const torch::Tensor& selection, int64_t value_dim,
                                                double scale) {
    const int64_t T = q.size(0), step = queries_at_a_time(rows, selection);
    torch::Tensor output = torch::empty({T, q.size(1), value_dim}, q.options());
    torch::Tensor mean_p = torch::empty({T, selection.size(1)}, q.options().dtype(torch::kFloat));
    for (int64_t first = 0; first < T; first += step) {
      const int64_t n = std::min(step, T - first);
      const Gathered g = gather(q.narrow(0, first, n), rows, selection.narrow(0, first, n), scale);
      output.narrow(0, first, n)
          .copy_(torch::bmm(g.p.to(q.scalar_type()), g.rows.narrow(2, 0, value_dim)));
      mean_p.narrow(0, first, n).copy_(g.p.mean(1));
    }
    context->save_for_backward({q, rows, selection, output});
    context->saved_data["value_dim"] = value_dim;
    context->saved_data["scale"] = scale;
    context->mark_non_differentiable({mean_p});
    return {output, mean_p};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    const auto saved = context->get_saved_variables();
    const torch::Tensor &q = saved[0], &rows = saved[1], &selection = saved[2], &output = saved[3];
    const int64_t value_dim = context->saved_data["value_dim"].toInt();
    const double scale = context->saved_data["scale"].toDouble();
    const int64_t T = q.size(0), step = queries_at_a_time(rows, selection);
    const torch::Tensor d_out = grads[0].contiguous();
    torch::Tensor d_q = torch::empty_like(q);
    // Hundreds of queries add to one row: in f32, whatever the compute type.
    torch::Tensor d_rows = torch::zeros(rows.sizes(), rows.options().dtype(torch::kFloat));
    for (int64_t first = 0; first < T; first += step) {
      const int64_t n = std::min(step, T - first);
      const torch::Tensor qs = q.narrow(0, first, n), d_o = d_out.narrow(0, first, n);
      const Gathered g = gather(qs, rows, selection.narrow(0, first, n), scale);
      const torch::Tensor values = g.rows.narrow(2, 0, value_dim);
      const torch::Tensor d_p = torch::bmm(d_o, values.transpose(1, 2)).to(torch::kFloat);
      const torch::Tensor row_sum =
          d_o.to(torch::kFloat).mul(output.narrow(0, first, n)).sum(-1, true);
      const torch::Tensor d_s =
          d_p.sub(row_sum).mul_(g.p).mul_(scale).to(q.scalar_type());  // [n, H, k]
      d_q.narrow(0, first, n).copy_(torch::bmm(d_s, g.rows));
      torch::Tensor d_g = torch::bmm(d_s.transpose(1, 2), qs);
      d_g.narrow(2, 0, value_dim).add_(torch::bmm(g.p.to(q.scalar_type()).transpose(1, 2), d_o));
      d_rows.index_add_(0, g.places, d_g.flatten(0, 1).to(torch::kFloat));
    }
    return {d_q, d_rows.to(rows.scalar_type()), {}, {}, {}};
  }
};

}  // namespace

SparseAttention sparse_attention(const torch::Tensor& q, const torch::Tensor& rows,
                                 const torch::Tensor& selection, int64_t value_dim, double scale) {
  const auto result = SparseAttentionFunction::apply(q, rows, selection, value_dim, scale);
  return {result[0], result[1]};
}

}  // namespace indexcache

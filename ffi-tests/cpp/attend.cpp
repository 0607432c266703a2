// Attention from C++: over equal keys, the output is the mean of the values.
#include <cmath>
#include <vector>

#include "../c/check.h"

int main() {
    const uint32_t dim = 64, block = 16, tokens = 40;
    std::vector<float> k(3 * block * dim, 0.5f), v(3 * block * dim), q(8 * dim, 1.0f), out(8 * dim);
    std::vector<float> lse(8);
    for (std::size_t i = 0; i < v.size(); i++) {
        v[i] = check_noise(static_cast<uint32_t>(i));
    }
    const std::vector<int32_t> table{2, 0, 1}, q_indptr{0, 1}, kv_lens{tokens};
    kvc_attend_desc desc;
    OK(kvc_attend_desc_init(&desc, sizeof desc));
    desc.q_heads = 8;
    desc.kv_heads = 1;
    desc.k_dim = desc.v_dim = dim;
    desc.format = KVC_FORMAT_F32;
    desc.q_dtype = desc.out_dtype = KVC_DTYPE_F32;
    desc.block_tokens = block;
    desc.num_blocks = 3;
    desc.seqs = 1;
    desc.k = k.data();
    desc.v = v.data();
    desc.table = table.data();
    desc.table_stride = 3;
    desc.q_indptr = q_indptr.data();
    desc.kv_lens = kv_lens.data();
    desc.q = q.data();
    desc.out = out.data();
    desc.lse = lse.data();
    OK(kvc_attend_workspace_size(&desc, 1, tokens, &desc.workspace_bytes));
    std::vector<unsigned char> workspace(desc.workspace_bytes);
    desc.workspace = workspace.data();
    OK(kvc_attend(&desc));
    for (uint32_t c = 0; c < dim; c++) {
        double mean = 0.0;
        for (uint32_t t = 0; t < tokens; t++) {
            mean += double(v[(uint32_t(table[t / block]) * block + t % block) * dim + c]);
        }
        CHECK(check_close(out[7 * dim + c], float(mean / tokens), 1e-5f));
    }
    CHECK(check_close(lse[0], 4.0f + std::log(float(tokens)), 1e-4f));
    return check_result();
}

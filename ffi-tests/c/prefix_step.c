// A step's worth of prefix work in one call: unlock, commit, look up, each item with its own status.
#include "check.h"

enum { BLOCK = 4 };

int main(void) {
    kvc_prefix *prefix = NULL;
    uint32_t tokens[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
    int32_t blocks[4] = {10, 11, 12, 13};
    int32_t found[4] = {-7, -7, -7, -7};
    int32_t present[2] = {-7, -7};
    uint64_t evicted = 99;
    kvc_status unlocked[2];
    kvc_prefix_batch batch;
    kvc_prefix_commit commits[2];
    kvc_prefix_committed committed[2];
    kvc_prefix_query queries[3];
    kvc_prefix_answer answers[3];
    uint64_t pins[2];

    OK(kvc_prefix_create(BLOCK, 1, 8, &prefix));
    OK(kvc_prefix_batch_init(&batch, sizeof batch));
    OK(kvc_prefix_run(prefix, &batch));

    // Two commits, the second below where the first will be refused: not whole blocks.
    memset(commits, 0, sizeof commits);
    commits[0].name_space = 7;
    commits[0].tokens = tokens;
    commits[0].token_count = 8;
    commits[0].blocks = blocks;
    commits[0].block_ids = 2;
    commits[1] = commits[0];
    commits[1].token_count = 7;
    memset(queries, 0, sizeof queries);
    queries[0].name_space = 7;
    queries[0].tokens = tokens;
    queries[0].token_count = 16;
    queries[0].max_tokens = 15;
    queries[0].out_blocks = found;
    queries[0].capacity = 4;
    queries[0].pin = 1;
    queries[1] = queries[0];
    queries[1].capacity = 1;
    queries[2] = queries[0];
    queries[2].name_space = 8;
    queries[2].pin = 0;
    batch.commits = commits;
    batch.commit_count = 2;
    batch.out_committed = committed;
    batch.queries = queries;
    batch.query_count = 3;
    batch.out_answers = answers;
    memset(committed, 0xFF, sizeof committed);
    memset(answers, 0xFF, sizeof answers);
    OK(kvc_prefix_run(prefix, &batch));
    CHECK(committed[0].status == KVC_OK && committed[0].inserted.stored_blocks == 2);
    CHECK(committed[1].status == KVC_ERR_INVALID_ARGUMENT);
    CHECK(committed[1].inserted.stored_blocks == 0 && committed[1].reserved == 0);
    // Queries see the commits of their batch.
    CHECK(answers[0].status == KVC_OK && answers[0].hit.tokens == 8 && answers[0].pin != 0);
    CHECK(found[0] == 10 && found[1] == 11 && found[2] == -7);
    CHECK(answers[1].status == KVC_ERR_BUFFER_TOO_SMALL && answers[1].pin == 0);
    CHECK(answers[2].status == KVC_OK && answers[2].hit.tokens == 0 && answers[2].pin == 0);

    // Pinned: nothing goes. Then the commit of what follows, below the hit.
    OK(kvc_prefix_evict(prefix, 8, found, 4, &evicted));
    CHECK(evicted == 0);
    memset(&commits[0], 0, sizeof commits[0]);
    commits[0].above = answers[0].hit.at;
    commits[0].tokens = tokens + 8;
    commits[0].token_count = 8;
    commits[0].blocks = blocks + 2;
    commits[0].block_ids = 2;
    commits[1] = commits[0];
    commits[1].out_present = present;
    commits[1].capacity = 2;
    pins[0] = answers[0].pin;
    pins[1] = 12345;
    batch.unlocks = pins;
    batch.unlock_count = 2;
    batch.out_unlocked = unlocked;
    batch.query_count = 1;
    OK(kvc_prefix_run(prefix, &batch));
    CHECK(unlocked[0] == KVC_OK && unlocked[1] == KVC_ERR_STALE_HANDLE);
    CHECK(committed[0].inserted.stored_blocks == 2 && committed[0].inserted.present_blocks == 0);
    CHECK(committed[1].inserted.stored_blocks == 0 && committed[1].inserted.present_blocks == 2);
    CHECK(present[0] == 12 && present[1] == 13);
    CHECK(answers[0].hit.tokens == 12 && found[2] == 12);

    // What is wrong with the batch itself does nothing.
    batch.out_answers = NULL;
    FAILS(KVC_ERR_NULL_POINTER, "out_answers", kvc_prefix_run(prefix, &batch));
    FAILS(KVC_ERR_NULL_POINTER, "", kvc_prefix_run(prefix, NULL));
    batch.out_answers = answers;
    batch.struct_size = 12;
    FAILS(KVC_ERR_STRUCT_SIZE, "", kvc_prefix_run(prefix, &batch));
    batch.struct_size = sizeof batch;
    batch.commit_count = 0;
    batch.unlock_count = 0;
    queries[0].pin = 2;
    OK(kvc_prefix_run(prefix, &batch));
    CHECK(answers[0].status == KVC_ERR_INVALID_ARGUMENT && answers[0].hit.tokens == 0);
    OK(kvc_prefix_destroy(prefix));
    return check_result();
}

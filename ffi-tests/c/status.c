// Status codes, the text of the last error, and which library this is.
#include "check.h"

int main(void) {
    char text[256];
    char cut[8];

    // The guard symbol links, and the library is the one that the header describes.
    kvc_abi_0_1();
    CHECK(kvc_abi_version() == KVC_ABI_VERSION);
    CHECK(strcmp(kvc_version(), "0.1.0") == 0);
    CHECK(kvc_build_info(text, sizeof text) == strlen(text));
    CHECK(strncmp(text, "libkvcache 0.1.0; features: std", 31) == 0);
    CHECK(text[31] == ';' || text[31] == ' ');
    CHECK(strstr(text, "; cuda: none") != NULL);
    CHECK(kvc_build_info(NULL, 0) == strlen(text));

    // Before the first error the text is empty.
    CHECK(kvc_last_error(text, sizeof text) == 0 && text[0] == '\0');

    // Texts are cut as snprintf cuts them.
    CHECK(kvc_status_text(KVC_OK, text, sizeof text) == 2 && strcmp(text, "ok") == 0);
    memset(cut, '#', sizeof cut);
    CHECK(kvc_status_text(KVC_ERR_OUT_OF_BLOCKS, cut, 4) == strlen("out of blocks"));
    CHECK(memcmp(cut, "out\0####", 8) == 0);
    CHECK(kvc_status_text(-12345, text, sizeof text) > 0 && strcmp(text, "unknown status") == 0);

    // The numbers are pinned.
    CHECK(KVC_ERR_INVALID_ARGUMENT == -1 && KVC_ERR_NULL_POINTER == -2);
    CHECK(KVC_ERR_MISALIGNED == -3 && KVC_ERR_STRUCT_SIZE == -4 && KVC_ERR_OVERFLOW == -5);
    CHECK(KVC_ERR_UNSUPPORTED == -6 && KVC_ERR_STALE_HANDLE == -7);
    CHECK(KVC_ERR_BUFFER_TOO_SMALL == -8 && KVC_ERR_BAD_BLOCK == -9);
    CHECK(KVC_ERR_OUT_OF_BLOCKS == -100 && KVC_ERR_OUT_OF_SEQUENCES == -101);
    CHECK(KVC_ERR_OUT_OF_MEMORY == -102 && KVC_ERR_TOO_MANY_HANDLES == -103);
    CHECK(KVC_ERR_NO_KERNELS == -200 && KVC_ERR_NO_DEVICE == -201);
    CHECK(KVC_ERR_INVALID_STATE == -300 && KVC_ERR_PANIC == -900 && KVC_ERR_POISONED == -901);
    return check_result();
}

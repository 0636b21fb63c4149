/* Whatever a server sends, cut into whatever pieces: triple_request() stays within its buffer and takes an end. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "hal_memory.h"
#include "triple_burn.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    triple_reply reply;
    size_t room;
    char *buffer;
    int result;

    if (size < 2)
        return 0;
    room = 1 + (size_t)data[0] * 6;
    buffer = malloc(room);
    if (buffer == NULL)
        abort();
    memory_serve((const char *)data + 2, size - 2, 1 + data[1] % 64u, data[1] >= 128);
    result = triple_request(data[1] >> 5 & 1, "a1SampleWf0", "MAC-0001", "10.0.0.1:8000", buffer, room, &reply);
    if (memory_connections > TRIPLE_ATTEMPTS || (result == TRIPLE_OK && strlen(buffer) >= room))
        abort();
    if (result == TRIPLE_OK && reply.product_key[0] != '\0' && strcmp(reply.product_key, "a1SampleWf0") != 0)
        abort();
    free(buffer);
    return 0;
}
